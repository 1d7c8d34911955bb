"""What a client is told when something is wrong, in OpenAI's form."""


class Refusal(Exception):
    """A request that is not answered: `status` 4xx or 5xx, one sentence, and the field that it is about."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, headers=()):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, dict(headers)

    def body(self) -> dict:
        """The JSON object."""
        kind = {401: 'authentication_error', 404: 'not_found_error', 429: 'rate_limit_error'}.get(
            self.status, 'server_error' if self.status >= 500 else 'invalid_request_error'
        )
        return {'error': {'message': self.message, 'type': kind, 'param': self.param, 'code': self.code}}
