"""What every request shares, a file each: who is calling, bodies, refusals, idempotency, request ids, metrics."""
