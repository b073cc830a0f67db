"""What a process ends with, for what started it: launch/README.md is the table."""

FAILED, MISTAKEN, LOST = 1, 2, 42


class Lost(RuntimeError):
    """A process of this run did not come, is gone, or is stuck: start all of them again. (Or
    with the code of the process whose error ended the others.)"""

    def __init__(self, text: str, code: int = LOST):
        super().__init__(text)
        self.code = code


def code_of(error: BaseException) -> int:
    """The exit code of a command that an error ended."""
    code = getattr(error, "code", None)  # of an HTTP or gRPC error it is none
    if isinstance(code, int) and 0 < code < 256:
        return code
    return MISTAKEN if isinstance(error, ValueError) else FAILED
