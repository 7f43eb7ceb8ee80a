"""Every byte of every KV page file, checked: what is damaged, missing, or belongs to no stored page.

Knows files and their rows; knows nothing of budgets or tenants. Puts damaged files aside and changes nothing else.
"""

from __future__ import annotations

from ..errors import Corrupt, Incompatible
from .catalog import FILE, Catalog
from .cipher import ForeignKey, PageCipher
from .pages import Page

__all__ = ["verify"]


def verify(catalog: Catalog, cipher: PageCipher | None) -> list[str]:
    """See `PageStore.verify`."""
    problems: list[str] = []
    rows = catalog.rows()
    for key, row in rows.items():
        name = catalog.path(key).name
        try:
            page = Page(catalog.path(key), cipher)
            page.verify()
            found = (page.name, page.parent_name, page.identity, page.number)
            if found != (key, row.parent, row.identity, row.number):
                raise Corrupt(f"{name} holds another page than its name says")
        except ForeignKey:
            continue  # whoever has its page key can check it
        except FileNotFoundError:
            # Deleted since we asked, or really missing?
            if key in catalog.rows([key]):
                problems.append(f"pages/{name} is missing")
        except (Corrupt, Incompatible) as error:
            problems.append(f"pages/{error}")
            catalog.put_aside(key, str(error))
        except OSError as error:
            problems.append(f"pages/{name} can't be opened ({error.strerror})")
    for entry in catalog.listing():
        match = FILE.fullmatch(entry)
        if match is None:
            problems.append(f"pages/{entry} is not a file of this store")
        elif match[2] == ".page":
            key = bytes.fromhex(match[1])
            # Asked again: it may have been added or deleted since we began.
            if key not in rows and key not in catalog.rows([key]):
                problems.append(f"pages/{entry} belongs to no stored page")
    return sorted(problems)
