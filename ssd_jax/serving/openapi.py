"""The OpenAPI document of what is served."""

from typing import Any

import ssd_jax
from ssd_jax.serving.requests import (
  FORMATS,
  MOST_PARTIALS,
  QUALITIES,
  REFUSED,
  SEEDS,
  Served,
)

_ERRORS = {
    "400": "A field is wrong.", "401": "The key is missing or wrong.",
    "403": "The page that asks is of another site.",
    "404": "No such model.", "405": "The method is another.",
    "408": "The body took too long.", "411": "A form's length is missing.",
    "413": "The body is too long.",
    "415": "The body is not of this kind.", "429": "Too many images wait.",
    "500": "An error of the server.",
    "501": "The model cannot complete images.", "503": "The server ends.",
    "504": "The time for a request is over."}


def document(served: Served) -> dict[str, Any]:
  """Returns the document, OpenAPI 3.1.

  Args:
    served: What the server offers.
  """
  get = lambda text, kind: {"get": {
      "summary": text, "responses": {"200": {
          "description": text, **({"content": {kind: {}}} if kind else {})},
          **({} if kind else {"503": {"description": "No."}})}}}
  return {
      "openapi": "3.1.0",
      "info": {"title": f"ssd_jax: {served.names[0]}",
               "version": ssd_jax.__version__},
      "paths": {
          "/v1/images/generations": {"post": _drawing(
              "Draws images of a prompt.",
              {"application/json": {"schema": _reference("Request")}})},
          "/v1/images/edits": {"post": _drawing(
              "Completes an image below the rows that are kept.",
              {"multipart/form-data": {"schema": _EDIT}})},
          "/v1/models": get("The models that are served.", "application/json"),
          "/health": get("Whether images are decoded.", None),
          "/ready": get("Whether requests are accepted.", None),
          "/metrics": get("What is counted, for Prometheus.", "text/plain"),
      },
      "components": {
          "schemas": {"Request": _request(served), "Error": _ERROR},
          "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
  }


def _drawing(summary: str, content: dict[str, Any]) -> dict[str, Any]:
  error = {"application/json": {"schema": _reference("Error")}}
  return {
      "summary": summary,
      "security": [{"key": []}, {}],
      "requestBody": {"required": True, "content": content},
      "responses": {
          "200": {"description": "The images, or events of them.", "content": {
              "application/json": {"schema": _REPLY},
              "text/event-stream": {}}},
          **{status: {"description": text, "content": error}
             for status, text in _ERRORS.items()}},
  }


def _request(served: Served) -> dict[str, Any]:
  """Returns the schema of requests; null is a field that is not given."""
  limits = served.limits
  or_null = lambda kind, **more: {"type": [kind, "null"], **more}
  one_of = lambda *names: {"enum": [*names, None]}
  decoder = (or_null("string") if served.parse
             else one_of(*served.decoders))
  return {
      "type": "object", "required": ["prompt"],
      "properties": {
          "prompt": {"type": "string", "maxLength": limits.prompt,
                     "pattern": r"[^\s\x00-\x1f\x7f-\x9f]"},
          "model": one_of(*served.names),
          "n": or_null("integer", minimum=1, maximum=limits.images),
          "size": one_of("auto", served.size),
          "quality": one_of(*QUALITIES),
          "background": one_of("auto", "opaque"),
          "response_format": one_of("b64_json", "url"),
          "output_format": one_of(*FORMATS),
          "output_compression": or_null("integer", minimum=0, maximum=100),
          "stream": or_null("boolean"),
          "partial_images": or_null(
              "integer", minimum=0, maximum=MOST_PARTIALS,
              description="Unfinished images, with stream=true."),
          "seed": or_null(
              "integer", minimum=0, maximum=SEEDS - 1,
              description="The same seed gives the same images."),
          "guidance_scale": or_null("number", minimum=-10_000, maximum=10_000),
          "temperature": or_null("number", minimum=0, maximum=10_000),
          "top_k": or_null("integer", minimum=0, maximum=2**31 - 1),
          "top_p": or_null("number", exclusiveMinimum=0, maximum=1),
          "decoder": decoder,
          "progress": or_null(
              "boolean", description="Events with the order of commits."),
          **{name: {"type": "null"} for name in REFUSED},
      },
      "if": {"required": ["partial_images"], "properties": {
          "partial_images": {"type": "integer", "minimum": 1}}},
      "then": {"required": ["stream"], "properties": {
          "stream": {"const": True}}},
  }


def _reference(name: str) -> dict[str, str]:
  return {"$ref": f"#/components/schemas/{name}"}


_EDIT = {
    "type": "object", "required": ["image", "prompt"],
    "description": "Beside these, the fields of generations as text.",
    "properties": {
        "image": {"type": "string", "format": "binary"},
        "mask": {"type": "string", "format": "binary",
                 "description": "PNG, transparent from some row down."},
        "rows": {"type": "integer", "minimum": 1,
                 "description": "Rows of tokens that are kept."},
        "prompt": {"type": "string"}}}
_REPLY = {
    "type": "object", "required": ["created", "data", "usage"],
    "properties": {
        "created": {"type": "integer"},
        "data": {"type": "array", "items": {
            "type": "object", "required": ["seed", "passes", "decoder"],
            "properties": {
                "b64_json": {"type": "string"}, "url": {"type": "string"},
                "seed": {"type": "integer"}, "passes": {"type": "integer"},
                "decoder": {"type": "string"},
                "lossless": {"type": "boolean"}}}},
        "usage": {"type": "object"}}}
_ERROR = {
    "type": "object", "required": ["error"],
    "properties": {"error": {
        "type": "object", "required": ["message", "type", "param", "code"],
        "properties": {
            "message": {"type": "string"}, "type": {"type": "string"},
            "param": {"type": ["string", "null"]},
            "code": {"type": ["string", "null"]}}}}}
