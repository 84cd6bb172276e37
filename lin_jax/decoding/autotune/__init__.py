"""Choice of drafter and tree for this machine: step costs, replayed texts, plans, fallback to plain decoding."""
