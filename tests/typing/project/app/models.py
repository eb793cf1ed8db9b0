"""What the tasks of the example take and return."""

from dataclasses import dataclass
from typing import TypedDict

import msgspec
import pydantic


@dataclass
class Attachment:
    name: str
    content: bytes


class Customer(pydantic.BaseModel):
    id: int
    email: str


class Receipt(msgspec.Struct):
    message_id: str
    attempts: int


class Totals(TypedDict):
    month: str
    cents: int
