"""Models behind the meter: a streaming reverse proxy that asks Satmeter before each call and tells it afterwards.

It knows Satmeter by the wire alone, through app.client, and holds no database credential. `app.py` is the door,
`call.py` the money of one call, `asking.py` how an upstream is asked; every other file is a kind of row, or one thing
that rows share.
"""
