"""A TorchServe handler that speaks OpenAI's form: counts up to max_tokens, streamed if asked."""

# mypy: ignore-errors

import json

from ts.handler_utils.utils import send_intermediate_predict_response
from ts.torch_handler.base_handler import BaseHandler


class Counter(BaseHandler):
    """Needs no model: TorchServe is what is tested."""

    def initialize(self, context):
        self.initialized = True

    def handle(self, data, context):
        body = data[0].get("body") or data[0]
        body = json.loads(body) if isinstance(body, bytes | bytearray) else body
        count = body.get("max_tokens", 16)
        if count < 1:
            raise ValueError("max_tokens")
        usage = {"prompt_tokens": 5, "completion_tokens": count, "total_tokens": count + 5}
        if not body.get("stream"):
            text = "".join(f" t{number}" for number in range(count))
            return [json.dumps({**self._choice(body, text, "length"), "usage": usage})]
        for number in range(count):
            end = "length" if number == count - 1 else None
            self._send(self._choice(body, f" t{number}", end), context)
        if (body.get("stream_options") or {}).get("include_usage"):
            self._send({"choices": [], "usage": usage}, context)
        return ["data: [DONE]\n\n"]

    def _choice(self, body, text, end):
        choice = {"index": 0, "finish_reason": end}
        if "messages" in body:
            said = {"role": "assistant", "content": text}
            choice["delta" if body.get("stream") else "message"] = said
        else:
            choice["text"] = text
        return {"id": "1", "object": "", "created": 0, "model": "counter", "choices": [choice]}

    def _send(self, event, context):
        text = f"data: {json.dumps(event)}\n\n"
        send_intermediate_predict_response([text], context.request_ids, "ok", 200, context)
