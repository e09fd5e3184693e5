"""The wire: OpenAI's HTTP interface in front of an `EngineClient`. JSON and pydantic live here and nowhere below."""
