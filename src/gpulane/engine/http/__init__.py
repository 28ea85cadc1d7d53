"""Talks to any HTTP server: a job is one request, its answer passed on as it comes."""

from gpulane.engine.http.client import HttpServiceClient

__all__ = ["HttpServiceClient"]
