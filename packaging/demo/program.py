"""What the demo runs in a container: it looks at its kernel, a volume and the network."""

import os
import sys
import urllib.request

print("my kernel is", os.uname().release, flush=True)
with open("/data/letter") as letter:
    print("I read", letter.read().strip())
with urllib.request.urlopen(sys.argv[1], timeout=20) as answer:
    print("I talked to", answer.read().decode().strip())
print("done")
