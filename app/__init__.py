"""Satmeter: prepaid billing and crypto top-ups for people who sell AI inference."""

__version__ = "0.1.0"
