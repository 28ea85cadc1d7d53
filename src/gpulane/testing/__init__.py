"""Simulated engines and cards for tests, benches and `gpulane demo`; none of it imports the gateway's own code."""
