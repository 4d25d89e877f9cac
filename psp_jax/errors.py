"""Errors that the command line prints as one line."""


class UserError(Exception):
    """Bad input: the message is one line that says what is wrong and what to do.

    The command line prints it without a traceback and exits with code 2. Any other exception,
    except the two below, is a bug in psp_jax and keeps its traceback.
    """


class PassingError(Exception):
    """A failure that may not happen again, such as a disk that did not answer: exit code 1."""


class Stopped(BaseException):
    """A signal ended the run, and its work is saved. `code` is the exit code.

    It is not an Exception, so that no library catches it by accident.
    """

    def __init__(self, code: int, message: str):
        super().__init__(message)
        self.code = code


# Google's libraries name these gRPC codes in messages about a service that does not answer.
PASSING_TEXTS = ('UNAVAILABLE', 'DEADLINE_EXCEEDED', 'ABORTED', 'RESOURCE_EXHAUSTED')
