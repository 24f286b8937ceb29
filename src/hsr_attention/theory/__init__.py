"""The paper's statements as functions: what is predicted, and what arrays show."""
