"""The one error for data that is not as it should be: its message names the file, what was expected and what to do."""


class DataError(ValueError):
    """Text, a tokenizer, a token stream or a plan that cannot be used as asked."""
