"""A server that clients of OpenAI's and Anthropic's interfaces know. Needs the extra `server`."""

from edgephi.runtime.server.app import create_app
from edgephi.runtime.server.settings import ServerSettings

__all__ = ["ServerSettings", "create_app"]
