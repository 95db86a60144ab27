"""Clients of a running server: Client blocks, AsyncClient is for asyncio. Results are those of the embedded engine."""

from shorttail.client.blocking import Client
from shorttail.client.pipelined import AsyncClient

__all__ = ["AsyncClient", "Client"]
