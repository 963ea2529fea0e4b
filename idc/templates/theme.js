"use strict";
// In the head and so before anything is drawn: a page that loads for long would flash in the other theme first.
try {
  const stored = localStorage.getItem("idc-theme");
  if (stored) document.documentElement.dataset.theme = stored;
} catch { /* a page without storage follows the system */ }
