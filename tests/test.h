/* SPDX-License-Identifier: Apache-2.0 */
/* test.h - what cmocka wants included before it, in the order it wants it. */
#ifndef UCMT_TEST_H
#define UCMT_TEST_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#endif
