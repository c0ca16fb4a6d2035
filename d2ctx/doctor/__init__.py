"""Say what works in this environment and which command mends what does not.

Run it as `python -m d2ctx.doctor`; nothing has to be installed for it to run.
"""
