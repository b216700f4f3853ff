"""`make bench`: how fast the hot path is beside `pgbench`, on the same PostgreSQL, in the same minutes. Never a test."""
