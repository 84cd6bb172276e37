"""The demo: a softmax model becomes linear, and decodes with and without drafts; what that cost and brought is shown."""
