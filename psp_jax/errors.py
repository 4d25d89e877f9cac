"""The one kind of error that is the user's to mend."""


class UserError(Exception):
    """Bad input: the message is one line that names the culprit and the remedy.

    The command line prints it without a traceback and exits with code 2; anything else that is
    raised is a bug of ours and keeps its traceback.
    """
