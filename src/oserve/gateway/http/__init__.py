"""HTTP: endpoints, bodies, headers and errors of the OpenAI-compatible API."""
