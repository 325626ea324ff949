"""Saved chats: safetensors files that say what made them, and that are looked at all through before they are used."""

from mminfer.chat_files.chat_file import read_chat, write_chat
from mminfer.chat_files.identity import FILE_FORMAT, ChatIdentity

__all__ = ["FILE_FORMAT", "ChatIdentity", "read_chat", "write_chat"]
