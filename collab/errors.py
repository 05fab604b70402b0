"""The one exception that a person is meant to read."""


class UserError(Exception):
    """Something that the person at the keyboard can mend.

    Its text says what happened, what it means and what to type next, in this order; the programs print it without a
    traceback and exit with status 1. Anything else that reaches the top is a bug of ours and keeps its traceback.
    """
