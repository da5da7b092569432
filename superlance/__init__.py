"""Three event listeners for supervisor: httpok, crashmail and memmon."""

__version__ = '3.1.0'
