"""`edgeformer serve`: models over HTTP, with OpenAI's API. The app is `edgeformer.server.app.create_app`."""
