"""From what a user writes to model inputs, in the order of the way:

parts           what a message holds, as types
sources, remote files and URLs, opened
pixels, images, timeline, video_files, videos
                media of them, loaded
content         one message's content: the door where dicts become parts
messages        one chat of such messages
markers         a processor's placeholders, and its filler of embeddings
embeddings      which rows of a prompt are embeddings of the user's
model_inputs    typed chats through the host's processor
video_limit     frames left out until a video has no more than so many tokens
template        the host's chat template as text
transcript      what the cache of a chat holds, as text
rendering       the text that new parts add
joints          where it may be cut
cutting         that text in pieces
assembling      the model inputs of a piece
reading         these three together, with a bar of `progress`
reader          whoever does all this for one model
request         what is ready to be run
"""
