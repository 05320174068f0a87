"""Chats: templates, the parsing of replies, and pictures."""
