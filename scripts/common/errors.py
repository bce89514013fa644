"""The one error that a user is meant to read."""


class KilnError(Exception):
    """Something the user can mend: bad input, bad settings, a full disk.

    `message` says what is wrong, in which file and row, and what was expected; `hint` says what to
    do. Steps print both, without a traceback, and exit with status 1.
    """

    def __init__(self, message: str, hint: str):
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nHint: {self.hint}"

    def __reduce__(self):
        return type(self), (self.message, self.hint)
