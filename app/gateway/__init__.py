"""Models behind the meter: a door of its own that knows Satmeter by the wire alone."""
