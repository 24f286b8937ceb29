"""The paper's figures and tables, and ours: each a function that returns data, then a plot."""
