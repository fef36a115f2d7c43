# Prints every value of a JSON document as "path<tab>value", path parts joined by "/". Line ends and tabs in a value
# become spaces, so that a line is always one value.

{ text = text $0 "\n" }

END { at = 1; print_value("") }

function skip_blanks() {
    while (index(" \t\r\n", substr(text, at, 1)) && at <= length(text)) at++
}

function print_value(path,    first, rest) {
    skip_blanks()
    first = substr(text, at, 1)
    if (first == "{" || first == "[") { print_members(path, first); return }
    if (first == "\"") { print_line(path, take_string()); return }
    rest = substr(text, at)
    if (!match(rest, /^[-+.0-9A-Za-z]+/)) exit 1
    at += RLENGTH
    print_line(path, substr(rest, 1, RLENGTH))
}

function print_members(path, opening,    name, count, next_char) {
    at++
    skip_blanks()
    if (index("}]", substr(text, at, 1))) { at++; return }
    for (count = 0; at <= length(text); count++) {
        name = count
        if (opening == "{") { skip_blanks(); name = take_string(); skip_blanks(); at++ }
        print_value(path == "" ? name : path "/" name)
        skip_blanks()
        next_char = substr(text, at++, 1)
        if (next_char != ",") return
    }
}

function print_line(path, value) {
    gsub(/[\t\r\n]+/, " ", value)
    sub(/ +$/, "", value)
    gsub(/[\t\r\n]+/, " ", path)
    print path "\t" value
}

# The string that starts at `at`, unescaped; `at` moves behind its closing quote.
function take_string(    out, rest, mark) {
    if (substr(text, at, 1) != "\"") exit 1
    at++
    while (at <= length(text)) {
        rest = substr(text, at)
        if (!match(rest, /["\\]/)) exit 1
        out = out substr(rest, 1, RSTART - 1)
        at += RSTART
        if (substr(rest, RSTART, 1) == "\"") return out
        mark = substr(text, at++, 1)
        if (mark == "u") { out = out utf8(substr(text, at, 4)); at += 4 }
        else if (mark == "n" || mark == "r" || mark == "t") out = out " "
        else if (mark != "b" && mark != "f") out = out mark
    }
    exit 1
}

function utf8(digits,    i, code) {
    for (i = 1; i <= 4; i++) code = code * 16 + index("0123456789abcdef", tolower(substr(digits, i, 1))) - 1
    if (code < 32) return " "
    if (code < 128) return sprintf("%c", code)
    if (code < 2048) return sprintf("%c%c", 192 + int(code / 64), 128 + code % 64)
    # Halves of a pair beyond the basic plane: no name or key needs them.
    if (code >= 55296 && code < 57344) return "?"
    return sprintf("%c%c%c", 224 + int(code / 4096), 128 + int(code / 64) % 64, 128 + code % 64)
}
