"""Half-space reporting indexes: one file a structure, one protocol (``base.HalfspaceIndex``)."""
