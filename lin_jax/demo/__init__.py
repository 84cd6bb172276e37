"""The demo: a softmax model becomes linear, and decodes with and without drafts; a report shows what that brought."""
