"""The error that the person who asked can repair: a missing file, a word that is not known."""


class InputError(ValueError):
    """Bad input: the command ends with exit code 2."""
