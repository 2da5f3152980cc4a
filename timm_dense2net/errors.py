"""Messages of errors."""

__all__ = ['one_line']


def one_line(error: BaseException) -> str:
    """An error's message without line breaks, cut where it is very long."""
    text = ' '.join(str(error).split())
    return text if len(text) <= 300 else f'{text[:300]}...'
