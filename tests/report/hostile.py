"""Text that a hostile or broken checkpoint, trace or report may bring, and what has to survive it."""

HOSTILE = (
    "<script>alert(1)</script>",
    "]]><failure/><![CDATA[",
    "&amp; &lt; \" ' &#64;",
    "\x00\x08\x0b\x1b[31mred\x7f\x85",
    "\ud800 alone \udfff",
    "\ufffe\uffff\u202eright to left",
    "two\nlines\r\n::set-output name=x::y",
    "\n::stop-commands::token",
    " ##[add-mask]secret",
    "100%0A%25 a:b,c",
    "a | b || \\| c",
    "`one` ``two`` ```",
    "**bold** _it_ ~~no~~ [l](http://e.org) ![i](javascript:1) <http://e.org>",
    "@someone and @org/team see #12, org/repo#3 GH-4 https://example.org/1 www.example.org a@b.org",
    "- [ ] # heading\n\n1. list\n\n    code",
    " spaces at both ends ",
    "$x$ :tada: !1 ~label %2 &3",
    "`",
    "\\",
    "e\u0301 \u4e2d\u6587 \U0001f600",
)
