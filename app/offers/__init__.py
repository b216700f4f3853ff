"""A refusal that can be paid: an offer is a top-up with a challenge, and its proof stands for a key."""
