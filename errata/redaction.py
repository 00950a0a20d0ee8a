"""Secrets out of texts that people, logs and other programs read. Errors, log lines and pages go through `redact`."""

import os
import re

MASK = "***"

_PATTERNS = (
    # user:password@, or a bare token@, before a host: `postgresql://u:p@db/mlflow`, `https://token@mlflow.example`.
    (re.compile(r"(?<=://)[^\s/?#'\"<>]+@"), f"{MASK}@"),
    # Database drivers take slashes in a password as they are; a port before a slash is no password.
    (re.compile(r"(?<=://)[^\s/?#'\"<>@]*:(?!\d+[/?#])[^\s'\"<>]*@"), f"{MASK}@"),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"), MASK),
    (re.compile(r"(?i)\b(X-Amz-(?:Signature|Security-Token|Credential)|Signature|sig)=[^&\s'\"]+"), rf"\1={MASK}"),
    (re.compile(r"(?i)\b(authorization\W{1,4}(?:(?:bearer|basic) )?)[\w.~+/=-]+"), rf"\1{MASK}"),
)
_SECRET_NAME = re.compile(r"(?:SECRET_ACCESS_KEY|SESSION_TOKEN|PASSWORD|PASSWD|TOKEN|API_KEY|AUTH_STRING|SECRET)$", re.IGNORECASE)
_SHORTEST = 8
"""Characters. A shorter value of such a variable is no secret, but may well be a word of an ordinary sentence."""


def redact(text: str) -> str:
    """The text without what opens doors: user and password in URLs, AWS keys, signatures of presigned URLs, authorisation headers, and
    the values of environment variables that are named as secrets are (`AWS_SECRET_ACCESS_KEY`, `MLFLOW_TRACKING_PASSWORD`, …)."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and value in text and _SECRET_NAME.search(name):
            text = text.replace(value, MASK)
    for pattern, mask in _PATTERNS:
        text = pattern.sub(mask, text)
    return text
