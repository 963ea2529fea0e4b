"""Where raw material comes from: OpenS2V-5M, folders and buckets of videos, pictures of subjects, existing shards.

All are read from local paths and fsspec URLs, streamed, in the same order each time. A unit's id is made of names
relative to the source's folder and of what tells a changed file (its size, a checksum), never of where the folder lies:
raw material may be moved while a collection is made of it, and what was changed is read again.
"""

from idc.curate.sources.folder import VideoFolder
from idc.curate.sources.images import SubjectImages
from idc.curate.sources.opens2v import OpenS2V5M
from idc.curate.sources.opens2v_pairs import PairSettings
from idc.curate.sources.opens2v_record import to_record
from idc.curate.sources.shards import ExistingShards

__all__ = ["ExistingShards", "OpenS2V5M", "PairSettings", "SubjectImages", "VideoFolder", "to_record"]
