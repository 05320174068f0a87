"""Chats: templates, the parsing of replies, and images."""

from vicugna.chat.messages import Message, check_messages, check_tools
from vicugna.chat.reply import ReplyDelta, ReplyParser, parse_reply
from vicugna.chat.template import digest, encode, encode_training, render

__all__ = ["Message", "ReplyDelta", "ReplyParser", "check_messages", "check_tools", "digest",
           "encode", "encode_training", "parse_reply", "render"]
