"""What befalls files: they are cut off, or some of their bits change."""

import random


def damaged(content: bytes, luck: random.Random) -> bytes:
    """Cut off, with a bit turned over, with bytes put in or taken out, or empty."""
    place = luck.randrange(len(content))
    match luck.choice(["cut", "flip", "flip", "flip", "insert", "remove", "empty"]):
        case "cut":
            return content[:place]
        case "flip":
            return content[:place] + bytes([content[place] ^ 1 << luck.randrange(8)]) + content[place + 1 :]
        case "insert":
            return content[:place] + luck.randbytes(4) + content[place:]
        case "remove":
            return content[:place] + content[place + luck.randint(1, 40) :]
    return b""
