"""How proxies and gateways ask for metering: call by call, as a subrequest, and many at a time."""
