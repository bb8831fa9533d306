"""Imported by the server that ranks are forked from, and by nobody else: multiprocessing has no other way to tell it
what to do at its end, which comes by itself once the launcher and all ranks are gone."""

import atexit
import os
import shutil

from launch.fork_server import FOLDER

atexit.register(shutil.rmtree, os.environ[FOLDER], ignore_errors=True)  # ranks end without this
