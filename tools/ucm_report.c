/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Reports: facts and tables, written as they come.  One description of a table serves people
 * (aligned columns, human sizes) and programs (an array of objects with plain numbers).
 */
#include "tool.h"

#include <inttypes.h>
#include <string.h>

char *human_size(double bytes, char *buf, size_t len)
{
    static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB"};
    size_t u = 0;

    while (bytes >= 1024 && u + 1 < COUNT_OF(units)) {
        bytes /= 1024;
        u++;
    }
    int whole = bytes == (double)(int64_t)bytes || bytes >= 100;
    snprintf(buf, len, "%.*f %s", whole ? 0 : 1, bytes, units[u]);
    return buf;
}

static void json_string(FILE *out, const char *s)
{
    fputc('"', out);
    for (; *s; s++) {
        unsigned char c = (unsigned char)*s;
        if (c == '"' || c == '\\')
            fprintf(out, "\\%c", c);
        else if (c < 0x20)
            fprintf(out, "\\u%04x", c);
        else
            fputc(c, out);
    }
    fputc('"', out);
}

static void json_number(FILE *out, enum column_kind kind, double v)
{
    if (isnan(v))
        fputs("null", out);
    else if (kind == COLUMN_NUMBER)
        fprintf(out, "%.6g", v);
    else
        fprintf(out, "%.0f", v);
}

/* Begins a member of what is open: the comma, a new line, the name. */
static void json_member(struct report *r, const char *key)
{
    fprintf(r->out, "%s\n%*s", r->members++ ? "," : "", 2 * r->depth, "");
    if (key) {
        json_string(r->out, key);
        fputs(": ", r->out);
    }
}

void report_open(struct report *r, FILE *out, int json)
{
    *r = (struct report){.out = out, .json = json, .depth = 1};
    if (json)
        fputc('{', out);
}

void report_text(struct report *r, const char *key, const char *text)
{
    if (!r->json) {
        fprintf(r->out, "%-12s %s\n", key, text);
        return;
    }
    json_member(r, key);
    json_string(r->out, text);
}

static void print_number(FILE *out, enum column_kind kind, int width, int decimals, double v)
{
    char text[32];

    if (isnan(v))
        snprintf(text, sizeof text, "-");
    else if (kind == COLUMN_SIZE)
        human_size(v, text, sizeof text);
    else
        snprintf(text, sizeof text, "%.*f", kind == COLUMN_COUNT ? 0 : decimals, v);
    fprintf(out, "%*s", width, text);
}

void report_number(struct report *r, const char *key, enum column_kind kind, double value)
{
    if (r->json) {
        json_member(r, key);
        json_number(r->out, kind, value);
        return;
    }
    fprintf(r->out, "%-12s ", key);
    print_number(r->out, kind, 0, 2, value);
    fputc('\n', r->out);
}

void report_table(struct report *r, const char *key, const struct column *columns, unsigned n)
{
    r->columns = columns;
    r->ncolumns = n;
    if (r->json) {
        json_member(r, key);
        fputc('[', r->out);
        r->members = 0;
        r->depth = 2;
        return;
    }
    fputc('\n', r->out);
    for (unsigned i = 0; i < n; i++)
        if (columns[i].head)
            fprintf(r->out, "%s%*s", i ? "  " : "", columns[i].width, columns[i].head);
    fputc('\n', r->out);
}

static void json_row(struct report *r, const union cell *cells)
{
    json_member(r, NULL);
    for (unsigned i = 0; i < r->ncolumns; i++) {
        const struct column *c = &r->columns[i];
        fputs(i ? ", " : "{", r->out);
        json_string(r->out, c->key);
        fputs(": ", r->out);
        if (c->kind == COLUMN_TEXT)
            json_string(r->out, cells[i].text);
        else
            json_number(r->out, c->kind, cells[i].num);
    }
    fputc('}', r->out);
}

void report_row(struct report *r, const union cell *cells)
{
    if (r->json) {
        json_row(r, cells);
        return;
    }
    for (unsigned i = 0; i < r->ncolumns; i++) {
        const struct column *c = &r->columns[i];
        if (!c->head)
            continue;
        fputs(i ? "  " : "", r->out);
        if (c->kind == COLUMN_TEXT)
            fprintf(r->out, "%*s", c->width, cells[i].text);
        else
            print_number(r->out, c->kind, c->width, c->decimals, cells[i].num);
    }
    fputc('\n', r->out);
    fflush(r->out);
}

void report_table_end(struct report *r)
{
    if (!r->json)
        return;
    r->depth = 1;
    fprintf(r->out, "%s]", r->members ? "\n  " : "");
    r->members = 1;
}

void report_close(struct report *r)
{
    if (r->json)
        fputs("\n}\n", r->out);
    fflush(r->out);
}
