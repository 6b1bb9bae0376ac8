"""The viewer: ``python -m app.viewer [ROOT]`` shows run and result folders in a browser.

``catalog`` finds and reads the folders, and has no widgets. Each tab is a module.
"""
