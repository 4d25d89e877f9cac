"""Errors that the command line prints as one line."""


class UserError(Exception):
    """Bad input: the message is one line that names the culprit and the remedy.

    The command line prints it without a traceback and exits with code 2; anything else that is
    raised, but for PassingError, is a bug of ours and keeps its traceback.
    """


class PassingError(Exception):
    """What the same command may not meet again, such as a disk that did not answer: exit code 1."""


# In messages of libraries of Google about a service that does not answer: gRPC's codes.
PASSING_TEXTS = ('UNAVAILABLE', 'DEADLINE_EXCEEDED', 'ABORTED', 'RESOURCE_EXHAUSTED')
