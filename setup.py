from setuptools import setup

namespace = {}
with open('superlance/__init__.py', encoding='utf-8') as file:
    exec(file.read(), namespace)
with open('README.rst', encoding='utf-8') as readme, open('CHANGES.txt', encoding='utf-8') as changes:
    long_description = readme.read() + '\n\n' + changes.read()

setup(
    name='superlance',
    version=namespace['__version__'],
    description='Event listeners for supervisor that watch memory, HTTP and crashes',
    long_description=long_description,
    long_description_content_type='text/x-rst',
    license='BSD-3-Clause',
    license_files=['LICENSE.txt'],
    author='The superlance developers',
    packages=['superlance'],
    python_requires='>=3.8',
    install_requires=['supervisor>=4.2'],
    entry_points={
        'console_scripts': [
            'crashmail = superlance.crashmail:main',
            'httpok = superlance.httpok:main',
            'memmon = superlance.memmon:main',
        ],
    },
    classifiers=[
        'Development Status :: 5 - Production/Stable',
        'Environment :: No Input/Output (Daemon)',
        'Intended Audience :: System Administrators',
        'Operating System :: POSIX',
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3.8',
        'Programming Language :: Python :: 3.9',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Programming Language :: Python :: 3.13',
        'Programming Language :: Python :: 3.14',
        'Programming Language :: Python :: 3.15',
        'Topic :: System :: Boot',
        'Topic :: System :: Monitoring',
    ],
)
