/* SPDX-License-Identifier: Apache-2.0 */
/* The YAML reader: what it makes of a file, and what it says about one it does not take. */
#include "base/conf.h"

#include <stdio.h>

#include "../test.h"

struct list {
    char text[4096];
    int stop_at, n; /* fn fails at this pair */
};

static int note(void *arg, const struct ucmi_yaml_pair *p)
{
    static const char kinds[] = {[UCMI_YAML_TEXT] = '=',
                                 [UCMI_YAML_NULL] = '0',
                                 [UCMI_YAML_LIST] = 'L',
                                 [UCMI_YAML_MAP] = 'M'};
    struct list *list = arg;
    size_t at = strlen(list->text);
    snprintf(list->text + at, sizeof list->text - at, "%u %s %c %s\n", p->line, p->key,
             kinds[p->kind], p->value ? p->value : "-");
    return ++list->n == list->stop_at ? -ECANCELED : 0;
}

static void reads(const char *yaml, const char *expected)
{
    struct list list = {0};
    char why[256] = "";
    int err = ucmi_yaml_pairs("f.yaml", yaml, strlen(yaml), note, &list, why, sizeof why);
    assert_string_equal(why, "");
    assert_int_equal(err, 0);
    assert_string_equal(list.text, expected);
}

static void refuses(const char *yaml, const char *reason)
{
    struct list list = {0};
    char why[256] = "";
    int err = ucmi_yaml_pairs("f.yaml", yaml, strlen(yaml), note, &list, why, sizeof why);
    if (!strstr(why, reason))
        print_message("%s\n-> %s\n", yaml, why);
    assert_non_null(strstr(why, reason));
    assert_int_equal(err, -EINVAL);
}

/* As in the user guide, to the letter. */
static const char guide[] = "ucm_connectors:\n"
                            "  - ucm_connector_name: \"UcmPipelineStore\"\n"
                            "    ucm_connector_config:\n"
                            "      store_pipeline: \"Cache|Posix\"\n"
                            "      storage_backends: \"/mnt/test\"\n"
                            "      io_direct: false\n"
                            "      # cache_buffer_capacity_gb: 256\n"
                            "      # posix_capacity_gb: 1024\n"
                            "      use_gdr: false\n"
                            "enable_event_sync: true\n"
                            "use_layerwise: true\n"
                            "enable_record_traces: false\n"
                            "use_lite: false\n"
                            "persist_token_threshold: 0\n";

static void the_file_of_the_guide_is_a_flat_list(void **state)
{
    reads(guide, "2 ucm_connector_name = UcmPipelineStore\n"
                 "4 store_pipeline = Cache|Posix\n"
                 "5 storage_backends = /mnt/test\n"
                 "6 io_direct = false\n"
                 "9 use_gdr = false\n"
                 "10 enable_event_sync = true\n"
                 "11 use_layerwise = true\n"
                 "12 enable_record_traces = false\n"
                 "13 use_lite = false\n"
                 "14 persist_token_threshold = 0\n");
}

static void plain_pairs_null_quotes_and_lists(void **state)
{
    reads("a: 1\nb:\nc: ~\nd: \"\"\ne: 'null'\nf: NULL\n",
          "1 a = 1\n2 b 0 -\n3 c 0 -\n4 d = \n5 e = null\n6 f 0 -\n");
    reads("x: [/a, \"/b c\"]\ny:\n  - 1\n  - 2\nz: []\n", "1 x L /a:/b c\n2 y L 1:2\n5 z L \n");
    reads("{a: 1, ucm_connectors: [{ucm_connector_name: N, ucm_connector_config: {b: 2}}]}",
          "1 a = 1\n1 ucm_connector_name = N\n1 b = 2\n");
    reads("ucm_connectors:\n- ucm_connector_name: N\n  ucm_connector_module_path: my.mod\n"
          "  ucm_connector_config:\na: 1\n",
          "2 ucm_connector_name = N\n3 ucm_connector_module_path = my.mod\n5 a = 1\n");
    reads("---\na: \"\\u00fc\"\n...\n", "2 a = \xc3\xbc\n");
    reads("{}", "");
    reads("a: 1\r\nb: 2\r\n", "1 a = 1\n2 b = 2\n");
}

static void a_file_that_is_no_mapping_is_refused(void **state)
{
    refuses("", "f.yaml:1: the file is empty");
    refuses("# only a comment\n", "the file is empty");
    refuses("just words\n", "f.yaml:1: not a mapping");
    refuses("- a\n- b\n", "f.yaml:1: not a mapping");
    refuses("a: 1\n---\nb: 2\n", "f.yaml:2: a second document");
    refuses("a: 1\n  b: 2\n", "f.yaml:2: not well-formed YAML: mapping values are not allowed");
    refuses("a: [1, 2\nb: 3\n", "f.yaml:2: not well-formed YAML: ");
    refuses("a: \"open\n", "not well-formed YAML: found unexpected end of stream");
    refuses("a: 1\nb: \x01\n", "f.yaml:2: not well-formed YAML: ");
    refuses("a: 1\nb: \xff\n", "f.yaml:2: not well-formed YAML: ");
    refuses("a: \"x\\0y\"\n", "f.yaml:1: a text holds a zero byte");
    refuses("\"x\\0y\": 1\n", "f.yaml:1: a text holds a zero byte");
    refuses("? [a]\n: 1\n", "f.yaml:1: a key must be a plain word");
}

static void what_could_mean_something_else_is_refused(void **state)
{
    refuses("a: &x 1\n", "f.yaml:1: anchors and aliases (\"x\") are not supported");
    refuses("a: 1\nb: *y\n", "f.yaml:2: anchors and aliases (\"y\") are not supported");
    refuses("a: &l [1]\n", "anchors and aliases (\"l\")");
    refuses("a: &m {b: 1}\n", "anchors and aliases (\"m\")");
    refuses("a: !!str 5\n", "f.yaml:1: tags (\"tag:yaml.org,2002:str\") are not supported");
    refuses("a: !mine [1]\n", "tags (\"!mine\")");
    refuses("!mine {a: 1}\n", "tags (\"!mine\")");
    refuses("a: [\"/x:y\"]\n", "a: \"/x:y\" cannot be an item of a list");
    refuses("a: [x, ]\nb: [~]\n", "f.yaml:2: b: \"~\" cannot be an item of a list");
    refuses("a: [\"\"]\n", "cannot be an item of a list");
    refuses("a: [[1]]\n", "f.yaml:1: a: a list may hold plain values only");
    refuses("a:\n  b: 1\n", "f.yaml:1: a: a mapping is not expected here");
    refuses("ucm_connector_config:\n  b: 1\n",
            "ucm_connector_config: a mapping is not expected here");
}

static void there_is_one_connector_and_it_has_a_name(void **state)
{
    refuses("ucm_connectors:\n", "f.yaml:1: ucm_connectors: must be a list of one connector");
    refuses("ucm_connectors: {ucm_connector_name: N}\n", "ucm_connectors: must be a list of one");
    refuses("ucm_connectors: []\n", "ucm_connectors: the list is empty");
    refuses("ucm_connectors: [N]\n", "ucm_connectors: a connector is a mapping");
    refuses("ucm_connectors:\n- ucm_connector_config: {}\n",
            "f.yaml:1: ucm_connectors: ucm_connector_name is missing");
    refuses("ucm_connectors:\n- ucm_connector_name: A\n- ucm_connector_name: B\n",
            "f.yaml:3: ucm_connectors: a second connector; give exactly one");
    refuses("ucm_connectors:\n- ucm_connector_name: A\n  io_direct: true\n",
            "f.yaml:3: io_direct: not expected here; options go below ucm_connector_config");
    refuses("ucm_connectors:\n- ucm_connector_name: A\n  ucm_connector_config: /mnt\n",
            "f.yaml:3: ucm_connector_config: must be a mapping");
    refuses("ucm_connectors: [{ucm_connector_name: A}]\nb: 1\nucm_connectors: []\n",
            "ucm_connectors: given twice (line 1 and line 3); keep one");
    refuses("ucm_connectors:\n- ucm_connector_name: A\n  ucm_connector_config: {}\n"
            "  ucm_connector_config: {}\n",
            "ucm_connector_config: given twice (line 3 and line 4); keep one");
}

static void an_error_of_the_visitor_ends_the_reading(void **state)
{
    struct list list = {.stop_at = 2};
    char why[64] = "untouched";
    assert_int_equal(ucmi_yaml_pairs("f", "a: 1\nb: 2\nc: 3\n", 15, note, &list, why, sizeof why),
                     -ECANCELED);
    assert_int_equal(list.n, 2);
    assert_string_equal(why, "untouched");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_file_of_the_guide_is_a_flat_list),
        cmocka_unit_test(plain_pairs_null_quotes_and_lists),
        cmocka_unit_test(a_file_that_is_no_mapping_is_refused),
        cmocka_unit_test(what_could_mean_something_else_is_refused),
        cmocka_unit_test(there_is_one_connector_and_it_has_a_name),
        cmocka_unit_test(an_error_of_the_visitor_ends_the_reading),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
