"""The viewer: ``python -m app.viewer [ROOT]`` shows run and result folders in a browser.

``catalog`` finds and reads folders and knows nothing of widgets; each tab is a module of its own.
"""
