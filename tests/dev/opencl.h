/* SPDX-License-Identifier: Apache-2.0 */
/* opencl.h - the device of opencl.c among those that tests run over. */
#ifndef OPENCL_H
#define OPENCL_H

/* Where UCM_TEST_ALL is set, as `make test-devices` does, which installs what it takes. */
void opencl_add(void);

#endif
